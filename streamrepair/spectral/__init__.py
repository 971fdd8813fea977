"""Mathematics of singular values: the Marchenko–Pastur law, noise estimators, the threshold. No torch, no files."""
