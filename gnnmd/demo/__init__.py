"""The demo: train on the built-in silver set, run dynamics, compare with the labels' own potential."""
