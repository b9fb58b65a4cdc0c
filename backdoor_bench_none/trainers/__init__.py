"""Trainers besides the centralized one."""
