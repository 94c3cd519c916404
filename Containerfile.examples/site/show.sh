#!/bin/sh
# Prints a page of the site, as whom and from where.
set -eu
echo "user $(id -u), root $SITE_ROOT"
cat "$SITE_ROOT/$1.html"
