# Completion of sepdist.
function _sepdist
    set -l words (commandline -opc) (commandline -ct | string unescape)
    set -l found ($words[1] completion words $words[2..] 2> /dev/null)
    if test -n "$found"
        printf '%s\n' $found
    else
        set -l start (string match -r '^.*=' -- $words[-1])
        printf "$start%s\n" (__fish_complete_path (string replace -r '^.*=' '' -- $words[-1]))
    end
end
complete -c sepdist -f -a '(_sepdist)'
