package imgtest

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"
)

// Image is one layer of a chain, for Chain.
type Image struct {
	Path   string
	Format string // raw, qcow2 or parallels ("ploop" is understood)
}

// qemuFormat translates our names of formats into QEMU's.
func qemuFormat(format string) string {
	if format == "ploop" {
		return "parallels"
	}
	return format
}

// Chain names a pile of images, top first, in a form that qemu-img and qemu-io
// take in place of a file name. The parents are given at run time, which is
// the only way to stack Parallels images in QEMU, and every format is stated,
// so nothing is probed. The lowest image gets no parent, whatever its header
// says.
func Chain(images ...Image) string {
	var node map[string]any
	for i := len(images) - 1; i >= 0; i-- {
		format := qemuFormat(images[i].Format)
		n := map[string]any{
			"driver": format,
			"file":   map[string]any{"driver": "file", "filename": images[i].Path},
		}
		switch {
		case node != nil:
			n["backing"] = node
		case format == "qcow2":
			n["backing"] = nil
		}
		node = n
	}
	b, err := json.Marshal(node)
	if err != nil {
		panic(err) // maps of strings: cannot happen
	}
	return "json:" + string(b)
}

// QemuImg runs qemu-img, fails the test unless it exits 0, and returns its
// standard output.
func QemuImg(t testing.TB, args ...string) []byte {
	t.Helper()
	for try := 1; ; try++ {
		r := start(t, nil, "qemu-img", args...)
		if r.exit == 0 {
			return r.stdout
		}
		// It cannot measure how fast it makes a key while the machine is busy.
		if try == 20 || !bytes.Contains(r.stderr, []byte("Unable to get accurate CPU usage")) {
			t.Fatalf("qemu-img %s: exit %d\n%s", strings.Join(args, " "), r.exit, r.all())
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// QemuIO runs commands of qemu-io, one after the other, on an image of the
// stated format (ref may be a Chain, then format is ""). It fails the test
// when a command fails, also where qemu-io itself exits 0.
func QemuIO(t testing.TB, format, ref string, commands ...string) string {
	t.Helper()
	args := []string{"-d", "unmap"}
	if format != "" {
		args = append(args, "-f", qemuFormat(format))
	}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	out := string(Run(t, "qemu-io", append(args, ref)...))
	for _, bad := range []string{"failed", "invalid"} {
		if strings.Contains(out, bad) {
			t.Fatalf("qemu-io %q on %s:\n%s", commands, ref, out)
		}
	}
	return out
}

// MapEntry is one line of qemu-img map --output=json.
type MapEntry struct {
	Start      int64  `json:"start"`
	Length     int64  `json:"length"`
	Depth      int    `json:"depth"`
	Present    bool   `json:"present"`
	Zero       bool   `json:"zero"`
	Data       bool   `json:"data"`
	Compressed bool   `json:"compressed"` // QEMU 8.2 and later
	Offset     *int64 `json:"offset"`     // host offset, nil when there is none
	Filename   string `json:"filename"`
}

// QemuMap is qemu-img map of an image (ref may be a Chain, then format is "").
func QemuMap(t testing.TB, format, ref string) []MapEntry {
	t.Helper()
	args := []string{"map", "--output=json"}
	if format != "" {
		args = append(args, "-f", qemuFormat(format))
	}
	out := QemuImg(t, append(args, ref)...)
	var entries []MapEntry
	if err := json.Unmarshal(out, &entries); err != nil {
		t.Fatalf("qemu-img map %s: %v\n%s", ref, err, out)
	}
	return entries
}

// QemuCheck runs qemu-img check: 0 clean, 1 not completed, 2 corrupt, 3 leaks
// only, 63 unsupported. A clean bill is weak evidence: see the package's
// oracles for content.
func QemuCheck(t testing.TB, path, format string) (exit int, out string) {
	t.Helper()
	return Try(t, "qemu-img", "check", "-f", qemuFormat(format), path)
}

// QemuRaw writes what QEMU reads from an image or chain to out, as a raw file
// (ref may be a Chain, then format is "").
func QemuRaw(t testing.TB, format, ref, out string) {
	t.Helper()
	args := []string{"convert", "-O", "raw"}
	if format != "" {
		args = append(args, "-f", qemuFormat(format))
	}
	QemuImg(t, append(args, ref, out)...)
}
