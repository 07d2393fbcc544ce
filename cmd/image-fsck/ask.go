package main

import (
	"bufio"
	"fmt"
	"io"
	"strings"

	"github.com/imagestack/imagestack/fsck"
)

// asker decides by asking. A question that was answered with no is not asked
// again in a later round.
type asker struct {
	in     *bufio.Reader
	out    io.Writer
	before func()
	all    bool // "a": yes to everything else
	none   bool // end of the input: no to everything else
	no     map[string]bool
}

func (a *asker) decide(f fsck.Finding) bool {
	key := f.Code.Name + "\x00" + f.Place.String()
	if a.all || a.none || a.no[key] {
		return a.all && !a.no[key]
	}
	a.before()
	fmt.Fprintf(a.out, "%s\n", line(&f))
	for {
		fmt.Fprintf(a.out, "  %s? [y]es, [n]o, [a]ll: ", fixText(f.Fix))
		answer, err := a.in.ReadString('\n')
		if err != nil {
			a.none = true
			fmt.Fprintln(a.out)
			return false
		}
		switch strings.ToLower(strings.TrimSpace(answer)) {
		case "y", "yes":
			return true
		case "a", "all":
			a.all = true
			return true
		case "n", "no":
			if a.no == nil {
				a.no = map[string]bool{}
			}
			a.no[key] = true
			return false
		}
	}
}
