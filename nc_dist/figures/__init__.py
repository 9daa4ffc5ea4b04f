"""Figures of measurements, drawn with matplotlib where it is installed."""
