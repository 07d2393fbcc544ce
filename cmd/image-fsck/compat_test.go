package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/internal/imgtest"
)

// compatCase is an image on which qemu-img and we must say the same.
type compatCase struct {
	name string
	make func(t *testing.T, path string)
	args []string // of qemu-img check
	ours []string
	// loose: how many errors one broken entry is, and what the statistics say
	// in its presence, is a matter of taste. Exit code, keys and phrases are
	// not.
	loose bool
}

// refcounts is where the first refcount block of a new qcow2 image lies.
const refcounts = 0x20000

func TestCompatQemu(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	t.Chdir(t.TempDir())
	filled := func(t *testing.T, path string) {
		imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", path, "10M")
		imgtest.QemuIO(t, "qcow2", path, "write -P 7 0 1M", "write -P 9 5M 64k", "write -P 8 2M 64k")
	}
	leak := func(t *testing.T, path string) {
		filled(t, path)
		poke(t, path, refcounts+2*40, []byte{0, 1})
		if err := os.Truncate(path, 41<<16); err != nil {
			t.Fatal(err)
		}
	}
	uncounted := func(t *testing.T, path string) { // a data cluster with count 0
		filled(t, path)
		poke(t, path, refcounts+2*10, []byte{0, 0})
	}
	pastEOF := func(t *testing.T, path string) {
		filled(t, path)
		poke(t, path, 0x40000, []byte{0x80, 0, 0, 0, 0x40, 0, 0, 0})
	}
	packed := func(t *testing.T, path string) {
		filled(t, "src.qcow2")
		imgtest.QemuImg(t, "convert", "-O", "qcow2", "-c", "src.qcow2", path)
	}
	for _, c := range []compatCase{
		{"clean", filled, nil, nil, false},
		{"empty", func(t *testing.T, path string) { imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", path, "10M") }, nil, nil, false},
		{"compressed", packed, nil, nil, false},
		{"leak", leak, nil, nil, false},
		{"leak fixed", leak, []string{"-r", "leaks"}, []string{"-p"}, false},
		{"uncounted", uncounted, nil, nil, true},
		{"uncounted fixed", uncounted, []string{"-r", "all"}, []string{"-y"}, true},
		{"past the end", pastEOF, nil, nil, true},
		{"parallels", func(t *testing.T, path string) {
			imgtest.QemuImg(t, "create", "-q", "-f", "parallels", path, "10M")
			imgtest.QemuIO(t, "parallels", path, "write -P 7 0 1M")
		}, nil, nil, false},
		{"raw", func(t *testing.T, path string) { imgtest.QemuImg(t, "create", "-q", "-f", "raw", path, "10M") }, nil, nil, false},
		{"nothing", func(*testing.T, string) {}, nil, nil, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			ext := map[string]string{"raw": ".raw", "parallels": ".hds"}[c.name]
			file := func(kind string) string { return strings.ReplaceAll(c.name, " ", "-") + "-" + kind + ext }
			for _, json := range []bool{true, false} {
				kind := map[bool]string{true: "json", false: "text"}[json]
				path := file(kind)
				c.make(t, path)
				theirs := filepath.Join("theirs", path)
				_ = os.Mkdir("theirs", 0o700)
				if b, err := os.ReadFile(path); err == nil {
					if err := os.WriteFile(theirs, b, 0o600); err != nil {
						t.Fatal(err)
					}
				}
				args, ours := append([]string{"check"}, c.args...), append([]string{"--compat=qemu"}, c.ours...)
				if json {
					args, ours = append(args, "--output=json"), append(ours, "--json")
				}
				exit, out := imgtest.Try(t, "sh", append([]string{"-c", `exec qemu-img "$@" 2>/dev/null`, "sh"}, append(args, theirs)...)...)
				got, _ := want(t, exit, append(ours, path)...)
				if json {
					sameJSON(t, out, strings.ReplaceAll(got, path, theirs), c.loose)
				} else {
					sameText(t, out, got, c.loose)
				}
			}
		})
	}
}

func sameJSON(t *testing.T, theirs, ours string, loose bool) {
	t.Helper()
	if theirs == "" && ours == "" {
		return
	}
	var a, b map[string]any
	if err := json.Unmarshal([]byte(theirs), &a); err != nil {
		t.Fatalf("%v: %s", err, theirs)
	}
	if err := json.Unmarshal([]byte(ours), &b); err != nil {
		t.Fatalf("%v: %s", err, ours)
	}
	if loose {
		for _, m := range []map[string]any{a, b} {
			for k := range m {
				if k != "total-clusters" && k != "check-errors" {
					m[k] = true
				}
			}
		}
	}
	if !reflect.DeepEqual(a, b) {
		t.Errorf("qemu-img\n%s\nwe\n%s", theirs, ours)
	}
}

var digits = regexp.MustCompile(`[0-9]+`)

// key are lines that scripts look for.
var key = regexp.MustCompile(`(?m)^.*(No errors|errors were found|leaked clusters|corruptions|Image end|allocated|following inconsist|Double|waste|corrupted).*$`)

func sameText(t *testing.T, theirs, ours string, loose bool) {
	t.Helper()
	if loose {
		theirs, ours = digits.ReplaceAllString(theirs, "N"), digits.ReplaceAllString(ours, "N")
	}
	a, b := key.FindAllString(theirs, -1), key.FindAllString(ours, -1)
	if !reflect.DeepEqual(a, b) {
		t.Errorf("qemu-img\n%s\nwe\n%s", theirs, ours)
	}
}
