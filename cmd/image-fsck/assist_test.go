package main

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/internal/keeper"
)

// requests are what a process may ask for that an image has taken over.
func requests() []string {
	return []string{
		`{"Act":"undo","Name":"/etc/passwd"}`, `{"Act":"undo","Name":"../../x"}`, `{"Act":"undo","Name":".."}`, `{"Act":"undo","Name":""}`,
		`{"Act":"undo-remove","Name":"/etc/passwd"}`, `{"Act":"undo-sync","Name":"/"}`, `{"Act":"dump"}`, `{"Act":"dump-done"}`,
		`{"Act":"attach"}`, `{"Act":"run","Step":"ext4 repair","Name":"../../etc/passwd"}`, `{"Act":"run","Step":"sh","Name":"p1"}`,
		`{"Act":"leave"}`, `{"Act":"keep-top"}`, `{"Act":"drop-top"}`, `{"Act":"x"}`, `{}`, `null`, `7`, `"(cancel)"`, `{"Act":`,
	}
}

// tried gives requests to a keeper that may make undo files in one directory,
// and a dump in another, and returns the files that are there afterwards.
func tried(t testing.TB, base string, requests ...string) []string {
	t.Helper()
	dir := filepath.Join(base, "undos")
	if err := os.MkdirAll(filepath.Join(base, "sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	setup, err := json.Marshal(assistSetup{Images: []string{filepath.Join(base, "a.qcow2")}, Undo: &dir, Dump: filepath.Join(base, "sub", "dump")})
	if err != nil {
		t.Fatal(err)
	}
	a, err := newAssistant(setup)
	if err != nil {
		t.Fatal(err)
	}
	for _, q := range requests {
		r := a.Serve(context.Background(), json.RawMessage(q), keeper.Given{FD: -1})
		if r.FD >= 0 {
			if err := unix.Close(r.FD); err != nil {
				t.Error(err)
			}
		}
	}
	a.End()
	var left []string
	err = filepath.WalkDir(base, func(path string, e os.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			rel, _ := filepath.Rel(base, path)
			left = append(left, rel)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return left
}

// The keeper does no more than was settled, whatever it is asked.
func TestAssistantBounds(t *testing.T) {
	left := tried(t, t.TempDir(), requests()...)
	slices.Sort(left)
	// Names with a directory lose it, and the dump was begun before "done".
	want := []string{"sub/dump", "undos/...undo", "undos/..undo", "undos/passwd.undo", "undos/x.undo"}
	if !slices.Equal(left, want) {
		t.Errorf("%q, want %q", left, want)
	}
}

func FuzzAssistant(f *testing.F) {
	for _, q := range requests() {
		f.Add(q, q)
	}
	base := f.TempDir()
	f.Fuzz(func(t *testing.T, first, second string) {
		for _, name := range tried(t, base, first, second) {
			if dir := filepath.Dir(name); dir != "undos" && name != "sub/dump" {
				t.Errorf("%q was made", name)
			}
			if err := os.Remove(filepath.Join(base, name)); err != nil {
				t.Error(err)
			}
		}
	})
}
