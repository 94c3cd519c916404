#!/bin/sh
# An image without a Containerfile: one working container, one command after the other. With SOURCE_DATE_EPOCH set
# it is, to the byte, the image of the Containerfile beside this script.
#
#     BASE=debian:bookworm ./build.sh notes:1
set -eu
cd "$(dirname "$0")"
pybuild=${PYBUILD:-pybuild}
image=${1:-notes:1}

c=$($pybuild from "${BASE:-localhost:5000/base/busybox:1}")
trap '$pybuild rm "$c" > /dev/null' EXIT

$pybuild config --env NOTES=/srv/notes "$c"
# A shell's command, as RUN has it; the words after -- go to the container as they are.
$pybuild run "$c" -- /bin/sh -c 'mkdir -p "$NOTES/drafts" && echo "by recipe or by hand" > "$NOTES/origin"'
$pybuild copy --chown 33:33 "$c" pages /srv/notes/pages
$pybuild add --chmod 600 "$c" secret.txt /srv/notes/drafts/
$pybuild config --workingdir /srv/notes/pages --env 'PATH=/srv/notes/bin:$PATH' "$c"
$pybuild run "$c" -- sh -c 'cat first.txt second.txt > ../all.txt && rm second.txt'
$pybuild config \
    --port 8080 \
    --volume /srv/notes/drafts \
    --label 'org.opencontainers.image.title=Notes, "quoted"' \
    --user 33:33 \
    --healthcheck 'test -e ../origin' --healthcheck-interval 30s --healthcheck-retries 2 \
    --stop-signal SIGTERM \
    --entrypoint '["cat"]' \
    --cmd '["../origin", "../all.txt"]' \
    "$c"
$pybuild commit "$c" "$image"
