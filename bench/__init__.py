"""Benchmarks of dsv3's ops against their floor and their peers: `python -m bench norm`; see README.md."""
