package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/imagestack/imagestack/fsck"
)

// asker decides by asking. A question that was answered with no is not asked
// again in a later round.
type asker struct {
	in     *bufio.Reader
	ctx    context.Context // of the run: Ctrl-C is no to everything else
	out    io.Writer
	before func()
	all    bool // "a": yes to everything else
	none   bool // end of the input: no to everything else
	no     map[string]bool
}

func (a *asker) decide(f fsck.Finding) bool {
	// Not the value: another fix at the same place may change it meanwhile. But
	// where there is no offset, of things in a descriptor, a field may be named
	// by its number, which is another's when one before it has gone.
	key := fmt.Sprintf("%s\x00%s\x00%d\x00%s", f.Code.Name, f.Place.File, f.Place.Offset, f.Place.Field)
	if f.Place.Offset < 0 {
		key += fmt.Sprintf("\x00%v", f.Place.Value)
	}
	if a.all || a.none || a.no[key] {
		return a.all && !a.no[key]
	}
	a.before()
	fmt.Fprintf(a.out, "%s\n", line(&f))
	for {
		fmt.Fprintf(a.out, "  %s? [y]es, [n]o, [a]ll: ", fixText(f.Fix))
		answer, err := a.read()
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

// read waits for a line, or for Ctrl-C: then the read that goes on ends with
// the process.
func (a *asker) read() (string, error) {
	type line struct {
		text string
		err  error
	}
	got := make(chan line, 1)
	go func() {
		text, err := a.in.ReadString('\n')
		got <- line{text, err}
	}()
	select {
	case l := <-got:
		return l.text, l.err
	case <-a.ctx.Done():
		return "", context.Cause(a.ctx)
	}
}
