package hostile

import (
	_ "embed"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// exitsText has a line for each case: the exit codes of the tools whose answer
// depends on how far they have to read (image-fsck -n finds damage, 4, or cannot
// go on, 8; image-compact may not meet what is wrong), "-" where the case does
// not ask the tool, and the name. Format writes it (see TestHostile).
//
//go:embed exits.txt
var exitsText string

// columns are the tools of exitsText.
var columns = []Tool{Partitions, Fsck, Repair, Estimate, Compact}

// Recorded reports whether the exit codes of a tool are in exits.txt.
func Recorded(t Tool) bool { return slices.Contains(columns, t) }

// recorded are the codes of exitsText.
var recorded = sync.OnceValue(func() map[string]map[Tool]int {
	all := map[string]map[Tool]int{}
	for line := range strings.Lines(exitsText) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		var words []string
		rest := strings.TrimSuffix(line, "\n")
		for range columns {
			rest = strings.TrimLeft(rest, " ")
			word, after, _ := strings.Cut(rest, " ")
			words, rest = append(words, word), after
		}
		codes := map[Tool]int{}
		for i, t := range columns {
			if n, err := strconv.Atoi(words[i]); err == nil {
				codes[t] = n
			}
		}
		name, err := strconv.Unquote(strings.TrimSpace(rest))
		if err != nil {
			panic(fmt.Sprintf("exits.txt: %q", line))
		}
		all[name] = codes
	}
	return all
})

// Format is a new exits.txt: that there is, with these codes.
func Format(codes map[string]map[Tool]int) string {
	all := maps.Clone(recorded())
	known := map[string]bool{}
	for _, c := range Cases() {
		known[c.Name] = true
	}
	maps.Copy(all, codes)
	var b strings.Builder
	b.WriteString("# Exit codes: mount-image --partitions, image-fsck -n, image-fsck -y, image-compact -n, image-compact\n")
	for _, name := range slices.Sorted(maps.Keys(all)) {
		if !known[name] {
			continue
		}
		for _, t := range columns {
			if code, ok := all[name][t]; ok {
				fmt.Fprintf(&b, "%2d ", code)
			} else {
				b.WriteString(" - ")
			}
		}
		fmt.Fprintf(&b, " %q\n", name)
	}
	return b.String()
}
