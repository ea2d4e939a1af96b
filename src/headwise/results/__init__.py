"""Rows of numbers: kept in whole files, with what they were measured on, and printed as tables."""
