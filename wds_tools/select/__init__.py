"""Datasets from datasets: chosen samples, and samples with other texts and fields."""
