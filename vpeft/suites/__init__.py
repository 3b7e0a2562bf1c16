"""Many runs that belong together: benchmarks of several tasks, their scores, tables and pictures."""

__all__: list[str] = []
