package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/fsck"
	"github.com/imagestack/imagestack/internal/cli"
	"github.com/imagestack/imagestack/internal/helper"
	"github.com/imagestack/imagestack/internal/imgtest"
	"github.com/imagestack/imagestack/internal/keeper"
)

// The test binary is image-fsck when this is set.
const toolEnv = "IMAGESTACK_TEST_IMAGE_FSCK"

func TestMain(m *testing.M) {
	// What the tool starts of itself must never run the tests: they would
	// start it again, and so on.
	if os.Getenv(toolEnv) != "" || keeper.Wanted() || helper.Wanted() {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// command is image-fsck with these arguments, not started yet. A process of
// its own: what it gives up it does not get back.
func command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, os.Args[0], args...)
	cmd.Env = append(os.Environ(), toolEnv+"=1")
	cmd.WaitDelay = 30 * time.Second
	return cmd
}

// want runs the tool and fails the test unless it exits as wanted.
func want(t *testing.T, exit int, args ...string) (stdout, stderr string) {
	t.Helper()
	var out, errOut bytes.Buffer
	cmd := command(t.Context(), args...)
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	if code := cmd.ProcessState.ExitCode(); code != exit {
		t.Fatalf("image-fsck %q: exit %d, want %d (%v)\n%s%s", args, code, exit, err, out.String(), errOut.String())
	}
	return out.String(), errOut.String()
}

// exitOf runs the tool and returns its exit code.
func exitOf(t *testing.T, args ...string) int {
	t.Helper()
	cmd := command(t.Context(), args...)
	_ = cmd.Run() // the exit code tells
	return cmd.ProcessState.ExitCode()
}

func TestUsage(t *testing.T) {
	t.Chdir(t.TempDir())
	if err := os.WriteFile("a.raw", make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{}, {"--no-such", "a.raw"}, {"-n", "-y", "a.raw"}, {"-p", "-y", "a.raw"}, {"-a", "-n", "a.raw"},
		{"-n", "--undo", "x", "a.raw"}, {"--undo", "x", "-y", "a.raw", "a.raw"}, {"--undo-apply", "x", "a.raw", "a.raw"},
		{"--undo-apply", "x", "-y", "a.raw"}, {"--compat", "vmware", "a.raw"}, {"--compat", "qemu", "a.raw", "a.raw"},
		{"--format", "vmdk", "a.raw"}, {"--memory", "x", "a.raw"}, {"--progress", "sometimes", "a.raw"}, {"-C-1", "a.raw"},
	} {
		_, stderr := want(t, 16, args...)
		if !strings.HasPrefix(stderr, "image-fsck: ") {
			t.Errorf("%q: %q", args, stderr)
		}
	}
	for _, args := range [][]string{{"none.raw"}, {"-y", "none.raw"}, {"-C", "99", "a.raw"}, {"--undo-apply", "none", "a.raw"}} {
		if _, stderr := want(t, 8, args...); !strings.HasPrefix(stderr, "image-fsck: ") {
			t.Errorf("%q: %q", args, stderr)
		}
	}
	for _, args := range [][]string{{"--help"}, {"--version"}, {"a.raw"}, {"-n", "a.raw"}, {"-f", "-a", "a.raw"}, {"-y", "a.raw", "a.raw"}} {
		want(t, 0, args...)
	}
	if names, _ := filepath.Glob("*"); len(names) != 1 {
		t.Errorf("left behind: %q", names)
	}
}

func TestOutput(t *testing.T) {
	t.Chdir(t.TempDir())
	if err := os.WriteFile("a\x1b.raw", make([]byte, 1000), 0o600); err != nil {
		t.Fatal(err)
	}
	stdout, stderr := want(t, 0, "-v", "a\x1b.raw")
	if strings.Contains(stdout, "\x1b") || !strings.Contains(stdout, "[raw.size.ragged]") || !strings.Contains(stdout, ": clean: 1 note\n") || stderr != "" {
		t.Errorf("%q %q", stdout, stderr)
	}
	stdout, _ = want(t, 8, "--json", "a\x1b.raw", "none")
	var doc struct {
		Version, Exit int
		Images        []struct {
			Image, Error string
			Exit         int
			Files        []struct {
				Format string
				Stats  map[string]any
				Found  struct {
					Worst    string
					Findings []map[string]any
				}
			}
		}
	}
	dec := json.NewDecoder(strings.NewReader(stdout))
	if err := dec.Decode(&doc); err != nil {
		t.Fatal(err)
	}
	if _, err := dec.Token(); err != io.EOF {
		t.Error("more than one document")
	}
	if doc.Version != 1 || doc.Exit != 8 || len(doc.Images) != 2 || doc.Images[1].Error == "" || doc.Images[0].Files[0].Found.Worst != "note" ||
		doc.Images[0].Files[0].Found.Findings[0]["code"] != "raw.size.ragged" || doc.Images[0].Files[0].Stats["virtual-size"] != 1000.0 {
		t.Errorf("%+v", doc)
	}
}

// docKeys are the keys of the schema, as docs/image-fsck.md has them.
func TestSchemaDocumented(t *testing.T) {
	doc, err := os.ReadFile("../../docs/image-fsck.md")
	if err != nil {
		t.Fatal(err)
	}
	code := fsck.Codes()[0]
	off := int64(1)
	full := fsck.Document{Images: []fsck.ImageDoc{{Error: "x", Files: []fsck.FileDoc{{
		Error: "x", Undo: "x", Lost: "x", Stats: &fsck.Stats{}, Found: &fsck.ReportDoc{
			Counts:   []fsck.CountDoc{{Code: code.Name}},
			Findings: []fsck.FindingDoc{{Offset: &off, Field: "x", Value: "x", Guest: []fsck.RangeDoc{{}}, Fix: &fsck.FixDoc{Loses: []fsck.RangeDoc{{}}}}},
		}, Later: []fsck.ReportDoc{{}}, Left: &fsck.ReportDoc{},
	}}, Stack: &fsck.ReportDoc{}}}}
	b, err := json.Marshal(full)
	if err != nil {
		t.Fatal(err)
	}
	var v any
	if err := json.Unmarshal(b, &v); err != nil {
		t.Fatal(err)
	}
	n := 0
	var walk func(any)
	walk = func(v any) {
		switch v := v.(type) {
		case map[string]any:
			for k, w := range v {
				n++
				if !bytes.Contains(doc, []byte("`"+k+"`")) && !bytes.Contains(doc, []byte("`"+k+"[]`")) {
					t.Errorf("key %q is not in the documentation", k)
				}
				walk(w)
			}
		case []any:
			for _, w := range v {
				walk(w)
			}
		}
	}
	walk(v)
	if n < 40 {
		t.Errorf("only %d keys", n)
	}
}

// The manual page and the help know the same flags.
func TestManFlags(t *testing.T) {
	man, err := os.ReadFile("../../man/image-fsck.8")
	if err != nil {
		t.Fatal(err)
	}
	plain := strings.ReplaceAll(string(man), `\-`, "-")
	help, _ := want(t, 0, "--help")
	for _, field := range strings.Fields(help) {
		flag, _, _ := strings.Cut(strings.TrimRight(field, ",.:;"), "=")
		if strings.HasPrefix(flag, "--") && flag != "--help" && flag != "--version" && flag != "--progress-fd" && !strings.Contains(plain, flag) {
			t.Errorf("%s is not in the manual page", flag)
		}
	}
}

func TestAsker(t *testing.T) {
	f := fsck.Finding{Code: fsck.Codes()[0], Text: "bad", Fix: &fsck.Fix{Text: "mend it", Level: fsck.Full}}
	at := func(off int64) fsck.Finding { f.Place.Offset = off; return f }
	var out strings.Builder
	a := &asker{ctx: t.Context(), in: bufio.NewReader(strings.NewReader("huh\ny\nN\nall\n")), out: &out, before: func() {}}
	for i, c := range []struct {
		off  int64
		want bool
	}{{1, true}, {2, false}, {2, false}, {3, true}, {4, true}, {2, false}} {
		if got := a.decide(at(c.off)); got != c.want {
			t.Errorf("%d: %v", i, got)
		}
	}
	// Another fix has changed what stands there.
	refused := at(2)
	refused.Place.Value = uint64(7)
	if a.decide(refused) {
		t.Error("yes to what was answered with no")
	}
	if n := strings.Count(out.String(), "mend it?"); n != 4 {
		t.Errorf("asked %d times: %s", n, out.String())
	}
	a = &asker{ctx: t.Context(), in: bufio.NewReader(strings.NewReader("")), out: io.Discard, before: func() {}}
	if a.decide(at(1)) || a.decide(at(2)) {
		t.Error("yes without an answer")
	}
}

// -C writes lines as e2fsck does.
func TestFDProgress(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	fd, err := unix.Dup(int(w.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	w.Close()
	p, err := newFDProgress(fd)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for i := range int64(100_000) {
			p.update(1, i, 100_000, "a b")
		}
		p.update(2, 7, 7, "c")
		p.close()
	}()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSuffix(string(b), "\n"), "\n")
	if len(lines) != 1001 || lines[0] != "1 0 1000 a b" || lines[999] != "1 999 1000 a b" || lines[1000] != "2 7 7 c" {
		t.Errorf("%d lines: %q … %q", len(lines), lines[0], lines[len(lines)-1])
	}
}

func TestExitCode(t *testing.T) {
	for code, want := range map[int]int{cli.ExitOK: 0, cli.ExitFailed: 8, cli.ExitUsage: 16, cli.ExitInUse: 8, cli.ExitDamaged: 4, 130: 32, 143: 32} {
		if got := exitCode(code); got != want {
			t.Errorf("%d: %d, want %d", code, got, want)
		}
	}
}

// -n opens nothing for writing: seen by the kernel, for every kind of image.
func TestReadOnly(t *testing.T) {
	imgtest.Require(t, "strace", "qemu-img")
	dir := t.TempDir()
	t.Chdir(dir)
	images := makeImages(t)
	for _, image := range images {
		before := tree(t, dir)
		args := append([]string{"-f", "-qq", "-s", "300", "-o", "|cat >&2", "-e", "trace=open,openat,openat2,creat,ftruncate,truncate,pwrite64,pwritev,fallocate,unlink,unlinkat,rename,renameat,renameat2,mkdir,mkdirat,utimensat,copy_file_range"},
			os.Args[0], "-n", image)
		cmd := exec.CommandContext(t.Context(), "strace", args...)
		cmd.Env = append(os.Environ(), toolEnv+"=1")
		out, _ := cmd.CombinedOutput() // the exit code is the tool's
		seen := 0
		for _, l := range strings.Split(string(out), "\n") {
			if !strings.Contains(l, "(") || strings.Contains(l, "/sys/") || strings.Contains(l, "/proc/") || strings.Contains(l, "/dev/null") {
				continue
			}
			if strings.Contains(l, "open") && strings.Contains(l, "O_RDONLY") {
				seen++
				continue
			}
			if strings.Contains(l, "open") && (strings.Contains(l, "O_RDWR") || strings.Contains(l, "O_WRONLY") || strings.Contains(l, "O_CREAT")) ||
				!strings.Contains(l, "open") && strings.Contains(l, ") = ") {
				t.Errorf("%s: %s", image, l)
			}
		}
		if seen == 0 {
			t.Errorf("%s: the trace is empty:\n%s", image, out)
		}
		if after := tree(t, dir); after != before {
			t.Errorf("%s: before\n%safter\n%s", image, before, after)
		}
	}
}

// tree lists all files with their hashes and times.
func tree(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.Walk(dir, func(path string, st os.FileInfo, err error) error {
		if err != nil || st.IsDir() {
			return err
		}
		fmt.Fprintln(&b, path, imgtest.SHA256File(t, path), st.ModTime(), st.Mode())
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}
