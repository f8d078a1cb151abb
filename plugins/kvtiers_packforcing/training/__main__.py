"""`python -m kvtiers_packforcing.training CONFIG.toml`, the same as `kvtiers train`."""

from kvtiers_packforcing.training.command import train

if __name__ == "__main__":
    train()
