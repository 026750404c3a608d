"""Metrics, loggers, profiler and watchdog."""
