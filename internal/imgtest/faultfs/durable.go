package faultfs

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
)

// open opens the file of a handle again, for reading and writing, whatever the
// handle is for and whether or not the file has a name.
func (h *file) open() (*os.File, uint64, error) {
	fd, ok := h.PassthroughFd()
	if !ok {
		return nil, 0, errors.ErrUnsupported
	}
	f, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", fd), os.O_RDWR, 0)
	if err != nil {
		return nil, 0, err
	}
	var st syscall.Stat_t
	if err := syscall.Fstat(int(f.Fd()), &st); err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	return f, st.Ino, nil
}

// change keeps what the file is before the first change after a sync. The
// function that it returns ends the change.
func (f *FS) change(h *file) (done func()) {
	f.mu.Lock()
	track := f.track
	f.mu.Unlock()
	if !track {
		return func() {}
	}
	f.changing.Lock()
	of, ino, err := h.open()
	if err != nil {
		return f.changing.Unlock
	}
	defer of.Close()
	f.mu.Lock()
	_, known := f.durable[ino]
	f.mu.Unlock()
	if known {
		return f.changing.Unlock
	}
	b, err := io.ReadAll(of)
	f.mu.Lock()
	defer f.mu.Unlock()
	if err == nil {
		if f.durable == nil {
			f.durable = map[uint64][]byte{}
		}
		f.durable[ino] = b
	}
	return f.changing.Unlock
}

// synced is after a sync with that verdict.
func (f *FS) synced(h *file, v Verdict) error {
	f.changing.Lock()
	defer f.changing.Unlock()
	f.mu.Lock()
	track := f.track
	f.mu.Unlock()
	if !track || v.Err != 0 && !v.Lose {
		return nil
	}
	of, ino, err := h.open()
	if err != nil {
		return err
	}
	defer of.Close()
	f.mu.Lock()
	b, changed := f.durable[ino]
	delete(f.durable, ino)
	f.mu.Unlock()
	if v.Err == 0 || !changed {
		return nil
	}
	if err := of.Truncate(0); err != nil {
		return err
	}
	_, err = of.WriteAt(b, 0)
	return err
}
