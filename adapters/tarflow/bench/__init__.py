"""`parallel-decode bench`: schedules, approximate rules and other people's samplers, timed in turn on one flow.

It needs what the command line needs: `pip install "parallel-decode[demo]"`.
"""
