"""Masked autoregressive flows of zuko, nflows and normflows: the same flows, whose inverses go through `pd.solve`.

from parallel_decode.adapters.maf import parallel
fast = parallel(flow)
"""

from parallel_decode.adapters.maf.parallel import Report as Report
from parallel_decode.adapters.maf.parallel import parallel as parallel
