package main

import (
	"strings"
	"sync"
	"testing"
)

// Several directories at once: those that can be unmounted are.
func TestUnmountSeveral(t *testing.T) {
	t.Parallel()
	_, path := qcow2Image(t)
	a, b, c, none := mountDir(t), mountDir(t), mountDir(t), mountDir(t)
	for _, dir := range []string{a, b, c} {
		want(t, 0, path, dir)
	}
	want(t, 0, "-u", a, b)
	unmounted(t, a)
	unmounted(t, b)
	o := want(t, 1, "-u", none, c, a)
	contains(t, "what was not mounted", o.stderr, none+": nothing is mounted there", a+": nothing is mounted there")
	unmounted(t, c)
	want(t, 2, path, a, b)
	want(t, 2, "-u")
}

// Several at once for one directory: one does it, and the others wait for the
// same or find nothing. What they say is about that, not about system calls.
func TestUnmountRace(t *testing.T) {
	t.Parallel()
	_, path := qcow2Image(t)
	dir := mountDir(t)
	for range 5 {
		want(t, 0, "-w", path, dir)
		var all sync.WaitGroup
		results := make([]outcome, 5)
		for i := range results {
			cmd := command("-u", dir)
			all.Go(func() { results[i] = runCmd(t, cmd) })
		}
		all.Wait()
		done := 0
		for _, o := range results {
			switch {
			case o.exit == 0 && o.stderr == "":
				done++
			case o.exit == 1 && (strings.Contains(o.stderr, "nothing is mounted there") || strings.Contains(o.stderr, "somebody else")):
			default:
				t.Errorf("exit %d: %s", o.exit, o.stderr)
			}
		}
		if done == 0 {
			t.Error("nobody has unmounted it")
		}
		unmounted(t, dir)
	}
}
