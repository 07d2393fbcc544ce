package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/guestfs"
	"github.com/imagestack/imagestack/guestfs/freespace"
	"github.com/imagestack/imagestack/internal/cli"
	"github.com/imagestack/imagestack/layers"
	"github.com/imagestack/imagestack/layers/open"
	"github.com/imagestack/imagestack/layers/ploop"
	"github.com/imagestack/imagestack/rewrite"
)

// holed makes a bundle with 4 clusters of zeros in front of 4 of data.
func holed(t *testing.T) string {
	t.Helper()
	ctx := context.Background()
	dir := t.TempDir()
	if err := ploop.CreateBundle(ctx, dir, ploop.CreateOptions{Size: 1 << 20, ClusterSize: ploop.MinCluster}); err != nil {
		t.Fatal(err)
	}
	s, err := open.Open(ctx, dir, open.Options{Writable: true})
	if err != nil {
		t.Fatal(err)
	}
	_, err1 := s.WriteAt(ctx, make([]byte, 4*ploop.MinCluster), 0)
	_, err2 := s.WriteAt(ctx, bytes.Repeat([]byte{7}, 4*ploop.MinCluster), 10*ploop.MinCluster)
	if err := errors.Join(err1, err2, s.Close()); err != nil {
		t.Fatal(err)
	}
	return dir
}

// execute runs the tool inside this process, which must not be confined.
func execute(args ...string) (code int, stdout, stderr string) {
	var out, errOut bytes.Buffer
	code = tool(&out, &errOut).Execute(context.Background(), append([]string{"--sandbox=off"}, args...), &out, &errOut)
	return code, out.String(), errOut.String()
}

// TestDocument pins the keys of the JSON document, which are an interface.
func TestDocument(t *testing.T) {
	image := holed(t)
	for _, c := range []struct {
		args []string
		want []string
	}{
		{[]string{"-n"}, []string{"action", "before", "cluster-size", "complete", "extra-space", "format", "guest", "ideal", "image", "layer", "moved", "reclaim", "steps", "version", "virtual-size"}},
		{nil, []string{"action", "after", "before", "cluster-size", "complete", "extra-space", "format", "guest", "ideal", "image", "layer", "moved", "reclaim", "steps", "version", "virtual-size"}},
	} {
		code, out, said := execute(append(c.args, "--json", image)...)
		if code != 0 || said != "" {
			t.Fatalf("exit %d\n%s%s", code, out, said)
		}
		var d map[string]json.RawMessage
		if err := json.Unmarshal([]byte(out), &d); err != nil {
			t.Fatal(err)
		}
		if got := slices.Sorted(maps.Keys(d)); !slices.Equal(got, c.want) {
			t.Errorf("%v: keys %q, want %q", c.args, got, c.want)
		}
		if string(d["reclaim"]) != "131072" || string(d["version"]) != "1" {
			t.Errorf("%v: %s", c.args, out)
		}
	}
	st, err := os.Stat(filepath.Join(image, ploop.RootName))
	if err != nil || st.Size() != 5*ploop.MinCluster {
		t.Errorf("%v, %v: want the BAT and four clusters", st.Size(), err)
	}
}

func TestPrint(t *testing.T) {
	r := &rewrite.Report{Image: "a\x1b[2Jb", Format: "qcow2", VirtualSize: 1 << 30, Before: rewrite.Size{Apparent: 3 << 20, Allocated: 2 << 20},
		Steps: []rewrite.Step{{Name: rewrite.PhaseGuest, Bytes: 1 << 20, Guest: 2 << 20}, {Name: rewrite.PhaseDedup, Skipped: "there is no parent"}},
		Guest: []guestfs.Area{
			{Name: "p1", Type: "ext4", Free: 2 << 20, Info: freespace.Info{Replayed: 5}},
			{Name: "p2", Type: "xfs", Refusal: &freespace.Refusal{Code: freespace.NotClean, Text: "the log\nis \x1b[31m dirty"}},
		},
		Notes: []string{"a note"}}
	var out bytes.Buffer
	if err := newDocument(actEstimate, r, nil).print(&out, true); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"3.0 MiB (3145728 bytes) long, 2.0 MiB (2097152 bytes) allocated", "1.0 MiB (1048576 bytes), 2.0 MiB of the disk",
		"not done: there is no parent", "read through its journal (5 blocks)", "not judged: ", "(not-clean)", "a note",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing in\n%s", want, out.String())
		}
	}
	if strings.ContainsRune(out.String(), '\x1b') {
		t.Errorf("what an image says reaches the terminal: %q", out.String())
	}
	out.Reset()
	d := newDocument(actCompact, r, errors.New("no space"))
	if err := d.print(&out, false); err != nil || d.Complete || !strings.Contains(out.String(), "incomplete") {
		t.Errorf("%v\n%s", err, out.String())
	}
}

func TestRate(t *testing.T) {
	for text, want := range map[string]rate{"1": 1, "50M": 50 << 20, "50M/s": 50 << 20, "1GiB/s": 1 << 30} {
		var r rate
		if err := r.UnmarshalText([]byte(text)); err != nil || r != want {
			t.Errorf("%q: %d, %v", text, r, err)
		}
	}
	for _, text := range []string{"", "0", "-1", "x", "5/h", "/s"} {
		if err := new(rate).UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q was taken", text)
		}
	}
}

// TestQuoted: what is shown as a command can be given to a shell.
func TestQuoted(t *testing.T) {
	for _, name := range []string{"a.qcow2", "/x/y-z_1.hds", "a b", "it's", "$(x)", "*", "~", "", "ü"} {
		out, err := exec.Command("sh", "-c", "printf %s "+quoted(name)).Output()
		if err != nil || string(out) != name {
			t.Errorf("%q is shown as %s, which is %q: %v", name, quoted(name), out, err)
		}
	}
}

func messageOf(err error) string { return cli.Message(toolName, err) }

// TestExplain: every refusal says what to do next.
func TestExplain(t *testing.T) {
	r := &run{flags: &flags{Image: "my disk.qcow2"}}
	for _, c := range []struct {
		err  error
		want string
	}{
		{rewrite.ErrPending, "image-compact --resume 'my disk.qcow2'"},
		{rewrite.ErrNotPending, "image-compact 'my disk.qcow2'"},
		{rewrite.ErrBase, "--to"},
		{os.ErrPermission, "nothing was changed"},
	} {
		var e interface{ Unwrap() error }
		err := r.explain(context.Background(), c.err, false)
		if !errors.As(err, &e) || !errors.Is(err, c.err) || !strings.Contains(messageOf(err), c.want) {
			t.Errorf("%v: %s", c.err, messageOf(err))
		}
	}
	// What was needed to find the image is needed again.
	r.Layer, r.AllowPath, r.Format, r.Image = 2, []string{"a b"}, "qcow2", "-x"
	if err := r.explain(context.Background(), rewrite.ErrPending, false); !strings.Contains(messageOf(err), "--resume --layer 2 --format qcow2 --allow-path 'a b' ./-x,") {
		t.Error(messageOf(err))
	}
	// No copy can be made of a lower layer.
	for _, c := range []error{rewrite.ErrBase, os.ErrPermission} {
		if said := messageOf(r.explain(t.Context(), c, false)); !strings.Contains(said, "layer") || strings.Contains(said, "--to") {
			t.Error(said)
		}
	}
	// What a copy that was killed has left is no run on the image.
	r.Layer, r.To = 0, "new"
	if said := messageOf(r.explain(t.Context(), rewrite.ErrPending, false)); strings.Contains(said, "--resume") {
		t.Error(said)
	}
	// What a run was told not to give back is not given back when the line that
	// is shown is entered, and what else it was told holds again, too.
	told := &run{flags: &flags{Image: "a", Guest: "off", Gaps: true, Swap: true, DedupParent: true, MostLeaked: true,
		Children: []string{"/over lays", "/b"}, MaxExtra: 1 << 20, RateLimit: 7}}
	const find = "--children '/over lays' --children /b --max-extra 1048576 --rate-limit 7 a"
	const begin = "image-compact --guest off --gaps --swap --dedup-parent --most-leaked " + find + "\n"
	ended, end := context.WithCancel(t.Context())
	end()
	for _, c := range []struct {
		ctx     context.Context
		err     error
		pending bool
		want    string
	}{
		{ended, context.Canceled, false, begin},
		{t.Context(), rewrite.ErrNotPending, false, begin},
		{ended, context.Canceled, true, "image-compact --resume " + find + ", or give up: image-compact --abandon " + find + "\n"},
		{t.Context(), rewrite.ErrPending, false, "image-compact --resume " + find + ", "},
	} {
		if said := messageOf(told.explain(c.ctx, c.err, c.pending)); !strings.Contains(said, c.want) {
			t.Errorf("%s\nwant %s", said, c.want)
		}
	}
	said := messageOf(told.explain(t.Context(), &layers.ImageError{Field: "leaks", Err: layers.ErrCorrupt}, false))
	if !strings.Contains(said, "image-fsck -n a;") {
		t.Error(said)
	}
	locked := &layers.ImageError{Path: "x, y", Field: "crypt_method", Err: layers.ErrUnsupported}
	if said := messageOf((&run{flags: &flags{Image: "x, y"}}).explain(t.Context(), locked, false)); !strings.Contains(said, "file.filename=x,, y'") {
		t.Error(said)
	}
	r = &run{flags: &flags{Image: "my disk.qcow2"}}
	stopped, stop := context.WithCancel(t.Context())
	stop()
	if err := r.explain(stopped, context.Canceled, false); strings.Contains(messageOf(err), "--resume") || !strings.Contains(messageOf(err), "begin again") {
		t.Error(messageOf(err))
	}
	if err := r.explain(stopped, context.Canceled, true); !strings.Contains(messageOf(err), "--resume") {
		t.Error(messageOf(err))
	}
	if err := r.explain(context.Background(), layers.ErrCorrupt, true); !strings.Contains(messageOf(err), "image-fsck -n") {
		t.Error(messageOf(err))
	}
	if err := r.explain(context.Background(), os.ErrDeadlineExceeded, true); !strings.Contains(messageOf(err), "--abandon 'my disk.qcow2'") {
		t.Error(messageOf(err))
	}
}

// TestStoppedBeforeResume: who stops --resume or --abandon at once is not told
// that nothing is left.
func TestStoppedBeforeResume(t *testing.T) {
	image := filepath.Join(holed(t), ploop.RootName)
	stopped, stop := context.WithCancel(t.Context())
	stop()
	try := func(mode string) string {
		t.Helper()
		var out, said bytes.Buffer
		if code := tool(&out, &said).Execute(stopped, []string{"--sandbox=off", mode, image}, &out, &said); code == 0 {
			t.Errorf("%s: exit 0", mode)
		}
		return said.String()
	}
	if err := os.WriteFile(image+recordSuffix, []byte(`{"version":1,"image":"`+ploop.RootName+`","layer":0}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, mode := range []string{"--resume", "--abandon"} {
		if said := try(mode); strings.Contains(said, "nothing was left") || !strings.Contains(said, "--resume "+image) {
			t.Errorf("%s: %s", mode, said)
		}
	}
	if _, err := os.Stat(image + recordSuffix); err != nil {
		t.Error(err)
	}
}
