"""The head: a second, much smaller vector field that carries the flow's chunk from t = 1 to t = 1 + T_r.

Knows torch and numpy only; `certificate` alone needs cvxpy, and imports it when it is used.
"""
