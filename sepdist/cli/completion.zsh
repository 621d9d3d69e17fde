# Completion of sepdist.
_sepdist() {
    local -a found
    found=("${(@f)$("${words[1]}" completion words "${(@Q)words[2,CURRENT]}" 2> /dev/null)}")
    if [[ -n ${found[1]} ]]; then
        compadd -S '' -- ${(M)found:#*[=.]}
        compadd -- ${found:#*[=.]}
    else
        compset -P '*='
        _files
    fi
}
compdef _sepdist sepdist
