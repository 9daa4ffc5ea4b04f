"""`python -m nc_dist` is the same as `nc-dist`."""

from nc_dist.cli import main

if __name__ == "__main__":
    main()
