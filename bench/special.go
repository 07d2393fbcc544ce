package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// firstByte measures the time from the start of the command, in the background
// as users run it, until the first byte of the disk has been read.
func (r *runner) firstByte(ctx context.Context, s *subject) (_ *sample, err error) {
	s.img, err = r.store.get(ctx, s.image, "")
	if err != nil {
		return nil, err
	}
	start := r.servers.daemonOurs
	if s.peer == peerQSD {
		start = r.servers.daemonQSD
	}
	x := &sample{load: loadAverage()}
	meter, err := startLoadMeter()
	if err != nil {
		return nil, err
	}
	begin := time.Now()
	d, err := start(ctx, s.img)
	if err != nil {
		return nil, err
	}
	s.serve = d.argv
	defer func() { err = errors.Join(err, d.end()) }()
	f, err := os.Open(d.file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, 0); err != nil {
		return nil, err
	}
	took := time.Since(begin)
	if b[0] != deepFirstByte {
		return nil, fmt.Errorf("%s shows %#x as the first byte, want %#x", s.peer, b[0], deepFirstByte)
	}
	x.value = float64(took.Microseconds()) / 1000
	pid, err := d.pid()
	if err != nil {
		return nil, err
	}
	if x.serverCPU, err = processCPU(pid); err != nil {
		return nil, err
	}
	if x.rss, err = peakRSS(pid); err != nil {
		return nil, err
	}
	x.other, x.steal, err = meter.stop(x.serverCPU)
	return x, err
}

// daemon is a server in the background.
type daemon struct {
	file string
	argv []string
	pid  func() (int, error)
	end  func() error
}

// background runs a command that returns once its daemon is ready. end is
// registered before, for whatever a failed start leaves.
func (s *servers) background(ctx context.Context, d *daemon, end func() error) (*daemon, []byte, error) {
	d.end = s.cleanup.add(end)
	cmd := exec.CommandContext(ctx, d.argv[0], d.argv[1:]...)
	detach(cmd)
	// A file and not a pipe: the daemon may keep it open.
	out, err := os.CreateTemp(s.dir, "daemon-")
	if err != nil {
		return nil, nil, err
	}
	defer os.Remove(out.Name())
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	err = cmd.Run()
	b, _ := os.ReadFile(out.Name())
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("%s: %w: %s", d.argv[0], err, lastLines(string(b), 3)), d.end())
	}
	return d, b, nil
}

func (s *servers) daemonOurs(ctx context.Context, img *image) (*daemon, error) {
	s.n++
	dir := filepath.Join(s.dir, fmt.Sprintf("mount-%d", s.n))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	d := &daemon{file: filepath.Join(dir, "disk.raw"), argv: append(s.mountImageArgs(img, dir, false), "--json")}
	d, said, err := s.background(ctx, d, func() error {
		err := command(context.Background(), s.mountImage, "-u", dir)
		detachMount(dir)
		return errors.Join(err, os.Remove(dir))
	})
	if err != nil {
		return nil, err
	}
	d.pid = func() (int, error) {
		var a struct{ PID int }
		err := json.Unmarshal(said, &a)
		return a.PID, err
	}
	return d, nil
}

func (s *servers) daemonQSD(ctx context.Context, img *image) (*daemon, error) {
	s.n++
	file := filepath.Join(s.dir, fmt.Sprintf("export-%d", s.n))
	pidfile := file + ".pid"
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		return nil, err
	}
	d := &daemon{file: file, argv: append(qsdArgs(img, file, pidfile, false), "--daemonize")}
	d.pid = func() (int, error) {
		b, err := os.ReadFile(pidfile)
		if err != nil {
			return 0, err
		}
		return strconv.Atoi(strings.TrimSpace(string(b)))
	}
	d, _, err := s.background(ctx, d, func() error {
		defer os.Remove(file)
		pid, err := d.pid()
		if err != nil {
			return nil // it never started
		}
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			return nil // gone
		}
		defer unix.Close(fd)
		_ = unix.PidfdSendSignal(fd, unix.SIGTERM, nil, 0)
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, int(stopLimit.Milliseconds()))
		if n == 0 {
			_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
			err = fmt.Errorf("process %d has not ended in %v and was killed: %w", pid, stopLimit, err)
		}
		detachMount(file)
		if e := os.Remove(pidfile); e != nil && !errors.Is(e, os.ErrNotExist) {
			err = errors.Join(err, e)
		}
		return err
	})
	return d, err
}

// pageCacheRead is how much is read to see what that leaves in the page cache.
const pageCacheRead = 1 << 30

// pageCache measures how much page cache a buffered read of a loop device with
// direct I/O fills, per byte: the pages of the device, of the served file and
// of the image together. It is the growth of the page cache of the machine, so
// that others disturb it.
func (r *runner) pageCache(ctx context.Context, l *line, s *subject) (_ *sample, err error) {
	if err := r.serve(ctx, l, s); err != nil {
		return nil, errors.Join(err, s.close())
	}
	defer func() { err = errors.Join(err, s.close()) }()
	if err := dropPages(s.img.layers); err != nil {
		return nil, err
	}
	dev, err := os.Open(s.loop.device)
	if err != nil {
		return nil, err
	}
	defer dev.Close()
	if err := unix.IoctlSetInt(int(dev.Fd()), unix.BLKFLSBUF, 0); err != nil {
		return nil, fmt.Errorf("dropping the pages of %s: %w", s.loop.device, err)
	}
	x := &sample{load: loadAverage()}
	before, err := pageCacheBytes()
	if err != nil {
		return nil, err
	}
	var n int64
	err = r.metered(s.srv, x, func() (time.Duration, error) {
		var err error
		n, err = io.CopyBuffer(struct{ io.Writer }{io.Discard}, io.LimitReader(dev, pageCacheRead), make([]byte, 128<<10))
		return 0, err
	})
	if err != nil {
		return nil, err
	}
	after, err := pageCacheBytes()
	if err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, errors.New("nothing to read")
	}
	x.value = float64(after-before) / float64(n)
	if x.value <= 0 {
		return nil, errors.New("the page cache of the machine shrank meanwhile")
	}
	return x, nil
}
