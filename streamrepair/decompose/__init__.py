"""One matrix in, its truncated delta out. torch and LAPACK; no files."""
