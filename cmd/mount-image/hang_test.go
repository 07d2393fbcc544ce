package main

import (
	"bytes"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/imagestack/imagestack/internal/imgtest"
)

// A server that hangs keeps -u waiting, but one Ctrl-C ends that, however the
// requests come to the server.
func TestInterruptHangingUnmount(t *testing.T) {
	for _, transport := range []string{"dev", "uring"} {
		t.Run(transport, func(t *testing.T) {
			if transport == "uring" {
				imgtest.RequireURing(t)
			}
			interruptHangingUnmount(t, transport)
		})
	}
}

func interruptHangingUnmount(t *testing.T, transport string) {
	_, path := qcow2Image(t)
	dir := mountDir(t)
	want(t, 0, "-w", "--transport", transport, path, dir)
	server := serverOf(t, dir)
	imgtest.Stop(t, server.pid)
	cmd := command("-u", dir)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = cmd.Wait()
	}()
	select {
	case <-ended:
		t.Fatalf("it does not wait for the server: %s", &stderr)
	case <-time.After(300 * time.Millisecond):
	}
	_ = cmd.Process.Signal(unix.SIGINT)
	select {
	case <-ended:
	case <-time.After(time.Minute): // on a busy machine it takes seconds
		_ = cmd.Process.Kill()
		t.Fatal("Ctrl-C does not end it")
	}
	if code := cmd.ProcessState.ExitCode(); code != 130 {
		t.Errorf("exit %d %s", code, &stderr)
	}
	contains(t, "hanging server", stderr.String(), "does not answer")
	if err := unix.Kill(server.pid, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	imgtest.Eventually(t, "the unmount", func() bool {
		return !isMounted(t, dir) || runCmd(t, command("-u", dir)).exit == 0
	})
	unmounted(t, dir)
}
