"""Whole models, one file each, built on the ops."""
