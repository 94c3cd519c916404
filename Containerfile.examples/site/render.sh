#!/bin/sh
# render.sh TITLE PAGE: a line that starts with "=> " is a link, the first line a heading.
set -eu
printf '<!doctype html>\n<title>%s</title>\n' "$1"
awk 'NR == 1 { print "<h1>" $0 "</h1>"; next }
     /^=> /  { printf "<p><a href=\"%s.html\">%s</a>\n", $2, $2; next }
     NF      { print "<p>" $0 }' "$2"
