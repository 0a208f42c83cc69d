"""`python -m stylegan_rooted` is the console script `stylegan-rooted`."""

from stylegan_rooted.cli import main

if __name__ == "__main__":
    main()
