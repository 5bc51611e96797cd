"""Columns to rows of token ids."""
