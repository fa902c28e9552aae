#!/bin/sh
# expect_failure.sh <pattern> <command>...: the command must fail and print a line with the pattern.
pattern=$1
shift
output=$("$@" 2>&1)
status=$?
printf '%s\n' "$output"
if [ "$status" -eq 0 ]; then
  echo "expected a failure"
  exit 1
fi
printf '%s\n' "$output" | grep -q "$pattern" && exit 0
echo "failed without: $pattern"
exit 1
