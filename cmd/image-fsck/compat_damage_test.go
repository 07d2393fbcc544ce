package main

import (
	"bytes"
	"encoding/json"
	"testing"

	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/imgtest/damage"
)

// differently is the damage that --compat qemu answers otherwise than qemu-img
// check (7.2) does: the exit codes of both, and why. docs/image-fsck.md tells.
var differently = map[string]struct {
	theirs, ours int
	why          string
}{
	"corrupt":              {0, 2, "the corrupt bit forbids writing, and qemu-img check does not mention it"},
	"size-0":               {0, 2, "data is mapped on a disk of no bytes"},
	"l2-copied-unmapped":   {0, 2, "a flag without a cluster"},
	"l2-zero-flag-v2":      {0, 2, "version 2 has no zero flag"},
	"extl2-bit0":           {0, 2, "extended entries have no zero flag"},
	"extl2-bit-set":        {3, 2, "the tables are plain ones, and half of the disk cannot be seen"},
	"l2-duplicate-counted": {3, 2, "two places of the disk share a cluster; the count that is right makes it no better"},
	"cut-data":             {0, 2, "the end of the data is missing"},
	"cut-table":            {3, 2, "the end of a table is missing"},
	"datafile-offset":      {0, 2, "the format demands the guest offset"},
	"leak-behind-eof":      {0, 3, "counted behind the end of the file"},
	"snapshot-l1-size":     {3, 2, "the disk of a snapshot is larger than its table"},
	"extension-twice":      {0, 2, "two extensions of one kind: which of them counts is anybody's guess"},
	"reftable-unaligned":   {1, 2, "qemu-img check breaks off; we count anew"},
}

// Of all damage the verdict is that of qemu-img check, but for what is named
// above.
func TestCompatDamage(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	step := 1
	if testing.Short() {
		step = 8
	}
	for i, d := range damage.Qcow2() {
		if want, ok := differently[d.Name]; i%step != 0 && !ok || step > 1 && want.theirs == 0 && ok {
			continue
		}
		t.Run(d.Name, func(t *testing.T) {
			dir := t.TempDir()
			img := d.Build(t, dir)
			exit, theirs := imgtest.Try(t, "sh", "-c", `exec qemu-img "$@" 2>/dev/null`, "sh", "check", "-f", "qcow2", "--output=json", img)
			var ours bytes.Buffer
			cmd := command(t.Context(), "--compat=qemu", "-n", "--json", "--format=qcow2", img)
			cmd.Stdout = &ours
			_ = cmd.Run() // the exit code tells
			code := cmd.ProcessState.ExitCode()
			if want, ok := differently[d.Name]; ok {
				if exit != want.theirs || code != want.ours {
					t.Errorf("qemu-img %d and we %d, want %d and %d: %s", exit, code, want.theirs, want.ours, want.why)
				}
				return
			}
			if exit != code {
				t.Fatalf("qemu-img %d, we %d\n%s\n%s", exit, code, theirs, ours.String())
			}
			if exit == 1 { // not opened: no document
				if ours.Len() > 0 {
					t.Errorf("we print\n%s", ours.String())
				}
				return
			}
			var a, b map[string]any
			if err := json.Unmarshal([]byte(theirs), &a); err != nil {
				t.Fatal(err)
			}
			if err := json.Unmarshal(ours.Bytes(), &b); err != nil {
				t.Fatal(err)
			}
			for _, k := range []string{"total-clusters", "check-errors", "format"} {
				if a[k] != b[k] {
					t.Errorf("%s: qemu-img %v, we %v", k, a[k], b[k])
				}
			}
			for _, k := range []string{"corruptions", "leaks-fixed", "corruptions-fixed"} {
				if (a[k] == nil) != (b[k] == nil) {
					t.Errorf("%s: qemu-img %v, we %v", k, a[k], b[k])
				}
			}
		})
	}
}
