"""Helpers that build what tests and demonstrations run on; nothing here is used while serving."""
