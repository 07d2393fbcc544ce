package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/imagestack/imagestack/internal/imgtest"
)

// TestSecrets: an image that names files of the host, or servers, as its parent
// or as its external data file leads nowhere: that is said, and nothing of them
// is opened or goes into a report. With -y as well, which changes nothing.
func TestSecrets(t *testing.T) {
	imgtest.Require(t, "qemu-img", "strace")
	outside := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(outside, []byte(strings.Repeat("very secret\n", 1000)), 0o600); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	t.Chdir(dir)
	hidden := filepath.Dir(outside)      // also a name for itself
	mine := filepath.Join(dir, "inside") // as long as the other
	for _, c := range []struct {
		name, code string
		args       []string
	}{
		{outside, "stack.parent.not-followed", nil},
		{"file:" + outside, "stack.parent.not-followed", nil},
		{`json:{"driver":"raw","file":{"driver":"file","filename":"` + outside + `"}}`, "stack.parent.not-followed", nil},
		{"nbd://127.0.0.1:1/x", "stack.parent.not-followed", nil},
		{"fat:rw:" + hidden, "stack.parent.not-followed", nil},
		{outside, "qcow2.datafile.unavailable", []string{"-o", "data_file=" + mine}},
	} {
		create := append([]string{"create", "-q", "-f", "qcow2"}, c.args...)
		if c.args == nil {
			create = append(create, "-u", "-F", "raw", "-b", c.name)
		}
		imgtest.QemuImg(t, append(create, "image", "1M")...)
		if c.args != nil {
			// The name in the header, as long as before.
			b, err := os.ReadFile("image")
			if err != nil {
				t.Fatal(err)
			}
			at := strings.Index(string(b), mine)
			if at < 0 || len(outside) != len(mine) {
				t.Fatal(at, mine, outside)
			}
			poke(t, "image", int64(at), []byte(outside))
		}
		before := imgtest.SHA256File(t, "image")
		for _, mode := range []string{"-n", "-y"} {
			cmd := command(t.Context(), mode, "--json", "image")
			cmd.Args = append([]string{"strace", "-f", "-o", "trace", "-e", "trace=open,openat,openat2,connect,socket", cmd.Path}, cmd.Args[1:]...)
			var err error
			if cmd.Path, err = exec.LookPath("strace"); err != nil {
				t.Fatal(err)
			}
			out, _ := cmd.Output() // the exit code tells
			if code := cmd.ProcessState.ExitCode(); code != 0 || !strings.Contains(string(out), c.code) || strings.Contains(string(out), "very secret") {
				t.Errorf("%s %s: exit %d: %s", mode, c.name, code, out)
			}
			trace, err := os.ReadFile("trace")
			if err != nil {
				t.Fatal(err)
			}
			if s := string(trace); !strings.Contains(s, `"image"`) || strings.Contains(s, hidden) || strings.Contains(s, "AF_INET") {
				t.Errorf("%s %s: it was opened", mode, c.name)
			}
		}
		if imgtest.SHA256File(t, "image") != before {
			t.Errorf("%s: the image was changed", c.name)
		}
		for _, name := range []string{"image", mine} {
			if err := os.RemoveAll(name); err != nil {
				t.Fatal(err)
			}
		}
	}
}
