package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/fsck/scavenge"
	"github.com/imagestack/imagestack/internal/imgtest"
)

// lostMap makes a disk with a filesystem, and an image of it without L1 table,
// in the working directory.
func lostMap(t *testing.T) {
	t.Helper()
	imgtest.Require(t, "mkfs.ext4")
	if err := os.Mkdir("files", 0o700); err != nil {
		t.Fatal(err)
	}
	for i := range 20 {
		if err := os.WriteFile(filepath.Join("files", string(rune('a'+i))), imgtest.PatternBytes(uint64(i), 0, 1000*i), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	imgtest.Run(t, "mkfs.ext4", "-q", "-d", "files", "d.raw", "64M")
	imgtest.QemuImg(t, "convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=16k", "d.raw", "a.qcow2")
	f, err := os.OpenFile("a.qcow2", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	head := make([]byte, 48)
	if _, err := f.ReadAt(head, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(make([]byte, 16), int64(binary.BigEndian.Uint64(head[40:]))); err != nil {
		t.Fatal(err)
	}
}

func TestScavenge(t *testing.T) {
	t.Chdir(t.TempDir())
	lostMap(t)
	before := tree(t, ".")
	for _, args := range [][]string{
		{"--scavenge", "new", "-y", "a.qcow2"}, {"--scavenge", "new", "a.qcow2", "a.qcow2"}, {"--guess", "a.qcow2"},
		{"--scavenge", "new", "--format", "raw", "a.qcow2"}, {"--scavenge", "new", "--to-format", "vmdk", "a.qcow2"},
		{"--scavenge", "no/such/new", "a.qcow2"}, {"--size", "1G", "a.qcow2"}, {"--scavenge", "new", "--dump", "x", "a.qcow2"},
	} {
		want(t, fsck.ExitUsage, args...)
	}
	want(t, fsck.ExitOperational, "--scavenge", "d.raw", "a.qcow2") // exists
	want(t, fsck.ExitOperational, "--scavenge", "new", "none.qcow2")
	want(t, fsck.ExitUncorrected, "--scavenge", "new", "d.raw") // no header, no format
	if after := tree(t, "."); after != before {
		t.Fatalf("changed:\n%s\n%s", before, after)
	}
	out, _ := want(t, fsck.ExitCorrected, "--scavenge", "new", "a.qcow2")
	if !strings.Contains(out, "rebuilt as new: ") || !strings.Contains(out, "all by proof") {
		t.Error(out)
	}
	imgtest.QemuImg(t, "compare", "-f", "qcow2", "-F", "raw", "new", "d.raw")
	want(t, fsck.ExitClean, "-n", "new")
	out, _ = want(t, fsck.ExitCorrected, "--scavenge", "raw", "--to-format", "raw", "--json", "--sandbox=off", "a.qcow2")
	var r scavenge.Report
	if err := json.Unmarshal([]byte(out), &r); err != nil || r.Version != scavenge.ReportVersion || r.New != "raw" || r.UnplacedBytes != 0 {
		t.Errorf("%v: %+v", err, r)
	}
	imgtest.SameContent(t, "raw", "d.raw")
}

// Ctrl-C leaves nothing behind.
func TestScavengeInterrupted(t *testing.T) {
	t.Chdir(t.TempDir())
	noise := make([]byte, 48<<20)
	_, _ = rand.NewChaCha8([32]byte{2}).Read(noise) // never fails
	if err := os.WriteFile("noise", noise, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := command(t.Context(), "--scavenge", "new", "--format", "ploop", "--size", "1G", "--cluster-size", "1M", "--progress", "plain", "noise")
	progress, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(progress)
	for n := 0; lines.Scan(); n++ {
		if n == 0 {
			if err := cmd.Process.Signal(unix.SIGINT); err != nil {
				t.Fatal(err)
			}
		}
	}
	_ = cmd.Wait() // its code tells
	if code := cmd.ProcessState.ExitCode(); code != fsck.ExitCancelled {
		t.Errorf("exit %d", code)
	}
	if names, _ := filepath.Glob("*"); len(names) != 1 {
		t.Errorf("left behind: %q", names)
	}
}

// docs/scavenge.md has all keys and all proofs.
func TestScavengeDocumented(t *testing.T) {
	doc, err := os.ReadFile("../../docs/scavenge.md")
	if err != nil {
		t.Fatal(err)
	}
	base := int64(0)
	b, err := json.Marshal(scavenge.Report{New: "x", LostFound: "x", Filesystems: []scavenge.Filesystem{{Base: &base}},
		Places: []scavenge.Place{{Votes: 1}}, Unplaced: []scavenge.Unplaced{{Places: []int64{1}, File: "x"}}, Unknown: []fsck.RangeDoc{{}}})
	if err != nil {
		t.Fatal(err)
	}
	var keys []string
	dec := json.NewDecoder(bytes.NewReader(b))
	for {
		tok, err := dec.Token()
		if err != nil {
			break
		}
		if s, ok := tok.(string); ok && s != "x" && s != "" {
			keys = append(keys, s)
		}
	}
	keys = append(keys, scavenge.ProofSurvived, scavenge.ProofFoundL1, scavenge.ProofSnapshot, scavenge.ProofOnlyPlace,
		scavenge.ProofGuest, scavenge.ProofShared, scavenge.ProofTails, scavenge.GuessRun)
	if len(keys) < 40 {
		t.Fatalf("keys: %q", keys)
	}
	for _, k := range keys {
		if !bytes.Contains(doc, []byte("`"+k+"`")) && !bytes.Contains(doc, []byte("`"+k+"[]`")) {
			t.Errorf("%q is not in the documentation", k)
		}
	}
}
