"""Maths that methods share; pure torch."""
