"""Generate from autoregressive models in parallel: fixed-point passes over triangular systems.

A *system* is what to solve, x_l = f_l(x_<l); a *schedule* is which positions each pass evaluates; `solve` does it.
"""

from parallel_decode._guard import NotFinite as NotFinite
from parallel_decode.auto import Auto as Auto
from parallel_decode.calibration import calibrate as calibrate
from parallel_decode.correction import Correction as Correction
from parallel_decode.function import from_function as from_function
from parallel_decode.plan import Plan as Plan
from parallel_decode.schedules import Chooser as Chooser
from parallel_decode.schedules import GaussSeidelJacobi as GaussSeidelJacobi
from parallel_decode.schedules import Jacobi as Jacobi
from parallel_decode.schedules import JacobiGaussSeidel as JacobiGaussSeidel
from parallel_decode.schedules import Schedule as Schedule
from parallel_decode.schedules import Sequential as Sequential
from parallel_decode.schedules import Sliding as Sliding
from parallel_decode.secant import SecantCorrection as SecantCorrection
from parallel_decode.selective import Selective as Selective
from parallel_decode.solution import LayerStats as LayerStats
from parallel_decode.solution import Solution as Solution
from parallel_decode.solution import SolveError as SolveError
from parallel_decode.solution import Status as Status
from parallel_decode.solver import Pass as Pass
from parallel_decode.solver import solve as solve
from parallel_decode.system import LayeredSystem as LayeredSystem
from parallel_decode.system import TriangularSystem as TriangularSystem
from parallel_decode.window import Window as Window

__version__ = "0.1.0"
