package crash

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/backend"
	"github.com/imagestack/imagestack/internal/imgtest"
)

// Oracle asks other programs about a state, in dir: qemu-img check about both
// formats, ploop check about ploop. Leaks are theirs to find; of an image that
// was not closed each says so in its own way, and nothing else may be wrong.
func Oracle(t testing.TB, dir string) func(*State) error {
	imgtest.Require(t, "qemu-img")
	imgtest.RequirePloop(t)
	return func(st *State) error {
		format := st.r.image.Format
		if format == "raw" || format == "" {
			return nil
		}
		for name, m := range st.Files {
			if err := os.WriteFile(filepath.Join(dir, name), m.Bytes(), 0o600); err != nil {
				return err
			}
		}
		path := filepath.Join(dir, ImageFile)
		if format == "qcow2" {
			return qemuCheck(t, st, path)
		}
		return errors.Join(qemuCheckPloop(t, path), ploopCheck(t, path))
	}
}

func qemuCheck(t testing.TB, st *State, path string) error {
	ref := map[string]any{"driver": "qcow2", "backing": nil, "file": map[string]any{"driver": "file", "filename": path}}
	for name := range st.Files {
		if name != ImageFile {
			ref["data-file"] = map[string]any{"driver": "file", "filename": filepath.Join(filepath.Dir(path), name)}
		}
	}
	b, err := json.Marshal(ref)
	if err != nil {
		return err
	}
	exit, out := imgtest.Try(t, "qemu-img", "check", "json:"+string(b))
	if exit == 0 || exit == 3 || st.dirty() {
		return nil
	}
	if exit == 2 && slices.Contains(st.r.op.May, copiedClear) && onlyCopiedClear(out) {
		return nil
	}
	return fmt.Errorf("qemu-img check: exit %d\n%s", exit, out)
}

// copiedClear is our code of a COPIED flag that is not set although it could
// be. The next write there copies the cluster, and nothing is lost; qemu-img
// check calls it an error all the same.
const copiedClear = "qcow2.l2.copied-clear"

// couldBeCopied is what it says: an entry without the flag, which is the
// highest bit, of a cluster with one reference.
var couldBeCopied = regexp.MustCompile(`^ERROR OFLAG_COPIED (data|L2) cluster: l[12]_entry=[0-9a-f]{1,15} refcount=1$`)

// onlyCopiedClear reports whether qemu-img check complains of nothing else.
func onlyCopiedClear(out string) bool {
	for line := range strings.Lines(out) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "ERROR") && !couldBeCopied.MatchString(line) {
			return false
		}
	}
	return true
}

// dirty is the bit by which a qcow2 image says that its counts are not right.
func (st *State) dirty() bool {
	var b [80]byte
	n, _ := st.Files[ImageFile].ReadAt(b[:], 0) // shorter: no bit
	return n == len(b) && b[79]&1 != 0 && b[7] == 3
}

func qemuCheckPloop(t testing.TB, path string) error {
	exit, out := imgtest.Try(t, "qemu-img", "check", "-f", "parallels", "--output=json", path)
	var v struct {
		Corruptions int `json:"corruptions"`
		CheckErrors int `json:"check-errors"`
	}
	text := out[strings.Index(out, "{")+0:]
	if err := json.NewDecoder(strings.NewReader(text)).Decode(&v); err != nil {
		return fmt.Errorf("qemu-img check: exit %d: %w\n%s", exit, err, out)
	}
	open := 0
	if strings.Contains(out, "not closed correctly") || isOpen(path) {
		open = 1
	}
	if v.CheckErrors > 0 || v.Corruptions > open {
		return fmt.Errorf("qemu-img check: exit %d, %d corruptions of an image with %d open marks\n%s", exit, v.Corruptions, open, out)
	}
	return nil
}

func isOpen(path string) bool {
	b, err := os.ReadFile(path)
	return err == nil && len(b) >= 64 && string(b[44:48]) == "Ynot"
}

// ploopCheck clears the mark of an open image (-d) and fills holes (-S), which
// are both what a power cut may leave, and looks for everything else.
func ploopCheck(t testing.TB, path string) error {
	// The check looks at host extents, which exist once synced.
	f, err := backend.Open(path, backend.Options{Writable: true})
	if err != nil {
		return err
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return err
	}
	exit, out := imgtest.Ploop(t, "check", "-f", "-c", "-d", "-S", path)
	if exit != 0 {
		return fmt.Errorf("ploop check: exit %d\n%s", exit, out)
	}
	return nil
}
