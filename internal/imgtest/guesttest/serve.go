package guesttest

import (
	"os/exec"
	"testing"
	"time"

	"github.com/imagestack/imagestack/internal/imgtest"
)

// Serve mounts something on dir with a FUSE server that stays in the
// foreground, and returns a function that unmounts it and returns when the
// server has ended: only then everything is in its image. At the end of the
// test it is unmounted in any case.
func Serve(t testing.TB, dir, name string, args ...string) (umount func()) {
	t.Helper()
	imgtest.RequireFuse(t)
	imgtest.Require(t, name, "mountpoint")
	server := exec.Command(name, args...)
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- server.Wait() }()
	for i := 0; exec.Command("mountpoint", "-q", dir).Run() != nil; i++ {
		select {
		case err := <-ended:
			t.Fatalf("%s %v: %v", name, args, err)
		case <-time.After(20 * time.Millisecond):
		}
		if i == 1000 {
			_ = server.Process.Kill() // the test fails anyway
			t.Fatalf("%s %v: no mount", name, args)
		}
	}
	mounted := true
	umount = func() {
		t.Helper()
		if !mounted {
			return
		}
		mounted = false
		imgtest.Umount(t, dir)
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
		case <-time.After(time.Minute):
			_ = server.Process.Kill() // the test fails anyway
			t.Errorf("%s does not end", name)
		}
	}
	t.Cleanup(umount)
	return umount
}
