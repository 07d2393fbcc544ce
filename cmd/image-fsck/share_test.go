package main

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/imagestack/imagestack/internal/imgtest"
)

// writer is a QEMU that has an image open for writing.
type writer struct {
	t    *testing.T
	in   io.WriteCloser
	path string
	cmd  *exec.Cmd
}

func startWriter(t *testing.T, path string) *writer {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "qemu-io", "-f", "qcow2", path)
	cmd.WaitDelay = 10 * time.Second
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return &writer{t, in, path, cmd}
}

// write stores data and waits until the image has grown to more than size.
func (w *writer) write(line string, size int64) {
	w.t.Helper()
	if _, err := io.WriteString(w.in, line+"\nflush\n"); err != nil {
		w.t.Fatal(err)
	}
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if st, err := os.Stat(w.path); err == nil && st.Size() > size {
			return
		}
		if time.Now().After(end) {
			w.t.Fatal("nothing was written")
		}
	}
}

func (w *writer) end() {
	w.t.Helper()
	if err := errors.Join(w.in.Close(), w.cmd.Wait()); err != nil {
		w.t.Fatal(err)
	}
}

// A dump beside a running VM: refused unless it is asked for, and then good for
// the moment at which it was made.
func TestDumpBesideWriter(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	t.Chdir(t.TempDir())
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "a.qcow2", "64M")
	w := startWriter(t, "a.qcow2")
	w.write("write -P 3 0 8M", 8<<20)
	_, stderr := want(t, 8, "--dump", "a.dump", "a.qcow2")
	if !strings.Contains(stderr, "--force-share") {
		t.Error(stderr)
	}
	if _, err := os.Stat("a.dump"); err == nil {
		t.Error("a dump of what was refused")
	}
	want(t, 16, "--force-share", "-n", "a.qcow2")
	want(t, 0, "--dump", "a.dump", "--force-share", "a.qcow2")
	out, _ := want(t, 0, "--dump-json", "-U", "a.qcow2")
	if !strings.Contains(out, `"shared":true`) {
		t.Errorf("%.300s", out)
	}
	w.write("write -P 4 32M 1M", 9<<20) // what came after the dump
	w.end()
	// A lost L1 table comes back.
	off := int64(3 * 65536) // where qemu-img puts it
	poke(t, "a.qcow2", off, make([]byte, 4096))
	if out, _ := want(t, 4, "-n", "a.qcow2"); !strings.Contains(out, "leak") {
		t.Fatalf("the table was not there: %s", out)
	}
	code := exitOf(t, "--restore", "a.dump", "-y", "a.qcow2")
	if code&^5 != 0 {
		t.Fatalf("restore: exit %d", code)
	}
	imgtest.QemuIO(t, "qcow2", "a.qcow2", "read -P 3 0 8M")
}

// An image that never stands still is not dumped.
func TestDumpUnstable(t *testing.T) {
	imgtest.Require(t, "qemu-img", "qemu-io")
	t.Chdir(t.TempDir())
	imgtest.QemuImg(t, "create", "-q", "-f", "qcow2", "a.qcow2", "64M")
	imgtest.QemuIO(t, "qcow2", "a.qcow2", "write 0 1M")
	f, err := os.OpenFile("a.qcow2", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Add(1)
	go func() {
		defer wg.Done()
		for n := 0; ; n++ {
			select {
			case <-stop:
				return
			default:
			}
			// A count far behind the clusters that there are.
			if _, err := f.WriteAt([]byte{byte(n >> 8), byte(n)}, 2*65536+60000); err != nil {
				return
			}
		}
	}()
	_, stderr := want(t, 8, "--dump", "a.dump", "-U", "a.qcow2")
	close(stop)
	wg.Wait()
	if !strings.Contains(stderr, "changes while it is read") {
		t.Error(stderr)
	}
	if _, err := os.Stat("a.dump"); err == nil {
		t.Error("a torn dump was put in its place")
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}
