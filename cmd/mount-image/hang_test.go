package main

import (
	"bytes"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A server that hangs keeps -u waiting, but one Ctrl-C ends that.
func TestInterruptHangingUnmount(t *testing.T) {
	t.Parallel()
	_, path := qcow2Image(t)
	dir := mountDir(t)
	want(t, 0, "-w", path, dir)
	server := serverOf(t, dir)
	if err := unix.Kill(server.pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Kill(server.pid, unix.SIGCONT) }()
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
	eventually(t, "the unmount", func() bool {
		return !isMounted(t, dir) || runCmd(t, command("-u", dir)).exit == 0
	})
	unmounted(t, dir)
}
