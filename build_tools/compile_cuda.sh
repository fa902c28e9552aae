# compile_cuda.sh COMMAND...: runs a compiler command that has `-Xptxas -v` and `-o OBJECT`; what ptxas
# says goes to OBJECT.ptxas, everything else to the terminal.
previous=
for argument in "$@"; do
  if [ "$previous" = -o ]; then object=$argument; fi
  previous=$argument
done
said=$("$@" 2>&1)
status=$?
ptxas='^ptxas info\|^ *[0-9]* bytes stack frame'
printf '%s\n' "$said" | grep "$ptxas" >"$object.ptxas"
printf '%s\n' "$said" | grep -v "$ptxas" | sed '/^$/d' >&2
exit "$status"
