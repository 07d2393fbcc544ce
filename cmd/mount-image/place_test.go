package main

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/fusefs"
	"github.com/imagestack/imagestack/internal/imgtest"
)

// A server that is killed before anybody knows of its mount leaves none; one
// that is killed later leaves a dead one, for those who use it to see. Nor does
// a keeper ever take away the mount of somebody else.
func TestKilledBeforeReady(t *testing.T) {
	imgtest.RequireFuse(t)
	for _, c := range []struct {
		name  string
		ready bool
		other bool // somebody else has mounted there in the meantime
		stays bool
	}{{name: "not ready"}, {name: "ready", ready: true, stays: true}, {name: "another mount", other: true, stays: true}} {
		t.Run(c.name, func(t *testing.T) {
			dir := mountDir(t)
			attach := func() (*place, int) {
				p := &place{Dir: dir, Source: "image"}
				r := p.serve(string(askAttach), -1)
				if r.Err != nil {
					t.Fatal(r.Err)
				}
				return p, r.FD
			}
			p, conn := attach()
			_ = unix.Close(conn) // the server has gone
			t.Cleanup(func() {
				for isMountedQuiet(dir) && fusefs.Unmount(dir, true) == nil {
				}
			})
			if !isMountedQuiet(dir) {
				t.Fatal("not mounted")
			}
			if c.ready {
				if r := p.serve(string(askReady), -1); r.Err != nil {
					t.Fatal(r.Err)
				}
			}
			if c.other {
				if err := fusefs.Unmount(dir, true); err != nil {
					t.Fatal(err)
				}
				_, conn := attach()
				t.Cleanup(func() { _ = unix.Close(conn) }) // before it is unmounted
			}
			p.End()
			if got := isMountedQuiet(dir); got != c.stays {
				t.Errorf("mounted: %v, want %v", got, c.stays)
			}
		})
	}
}
