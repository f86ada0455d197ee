"""The recipe language: what a recipe may say, and what is wrong with one that says something else."""
