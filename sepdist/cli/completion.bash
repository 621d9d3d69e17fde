# Completion of sepdist. Bash ends words at = and :, so only what follows them is replaced.
_sepdist() {
    local line=${COMP_LINE:0:COMP_POINT} word
    local -a words
    read -a words <<< "$line"
    [[ $line == *[!\\][[:space:]] ]] && words+=("")
    word=${words[-1]}
    mapfile -t COMPREPLY < <("${words[0]}" completion words "${words[@]:1}" 2> /dev/null)
    [[ ${COMPREPLY[0]} == *[=.] ]] && compopt -o nospace
    COMPREPLY=("${COMPREPLY[@]#"${word%"${word##*[=:]}"}"}")
}
complete -o default -F _sepdist sepdist
