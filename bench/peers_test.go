package main

import (
	"errors"
	"slices"
	"strings"
	"testing"
)

func TestQSDArgs(t *testing.T) {
	img := &image{format: "qcow2", layers: []string{"/d/top.qcow2", "/d/base.qcow2"}}
	got := strings.Join(qsdArgs(img, "/m", "/p", true), " ")
	for _, want := range []string{
		"filename=/d/base.qcow2,read-only=on", "node-name=l1,file=f1,read-only=on,backing= ",
		"filename=/d/top.qcow2,discard=unmap", "node-name=l0,file=f0,discard=unmap,backing=l1 ",
		"type=fuse,id=e,node-name=l0,mountpoint=/m,writable=on",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("%s\nlacks %s", got, want)
		}
	}
	got = strings.Join(qsdArgs(&image{format: "parallels", layers: []string{"/d/x.hds"}}, "/m", "/p", false), " ")
	if strings.Contains(got, "backing") || strings.Contains(got, "writable") || !strings.Contains(got, "driver=parallels") {
		t.Errorf("of a ploop image, read-only: %s", got)
	}
}

func TestCleaner(t *testing.T) {
	var c cleaner
	var done []int
	undo := func(n int) func() error {
		return func() error { done = append(done, n); return errors.New("failed") }
	}
	c.add(undo(1))
	second := c.add(undo(2))
	c.add(undo(3))
	if second() == nil || second() != nil {
		t.Error("undone early: want its error once")
	}
	if c.run() == nil || c.run() != nil {
		t.Error("want the errors once")
	}
	if !slices.Equal(done, []int{2, 3, 1}) {
		t.Errorf("undone in the order %v, want 2 early, then the latest first", done)
	}
}
