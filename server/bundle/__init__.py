"""One folder with everything that serving some models needs: `verbatim bundle`."""
