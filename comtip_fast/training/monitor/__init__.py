"""Monitoring of a run: loggers, reports of steps, profiler and watchdog."""
