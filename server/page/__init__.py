"""The page that a browser gets at `/`: the files that `make web` built from `web/`, and how they are sent."""
