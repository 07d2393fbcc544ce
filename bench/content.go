package main

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// The disks of the benchmark hold made-up but real data: no two blocks are
// alike, none is zero, and it compresses to a little less than half, as the
// files of a system do. A content is a function of seed and offset, so that
// what a server should show can be said without reading a second copy.

// patchBlock is the unit in which a content can be overwritten.
const patchBlock = 4096

// content is what a disk should show.
type content struct {
	size    int64
	zero    bool             // nothing was written below the patches
	seed    uint64           // of the data, unless zero
	patches map[int64]uint64 // seed by number of the 4 KiB block
}

// mix is a 64-bit finaliser: every bit of x moves about half of the result.
func mix(x uint64) uint64 {
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// fill makes the bytes of seed at off; off and len(p) are multiples of 8.
func fill(p []byte, seed uint64, off int64) {
	for i := 0; i+8 <= len(p); i += 8 {
		at := uint64(off+int64(i)) >> 3
		w := mix(seed ^ at*0x9e3779b97f4a7c15)
		if at&3 != 0 { // three words of four hold 16 bits, four times
			w = w & 0xffff * 0x0001000100010001
		}
		binary.LittleEndian.PutUint64(p[i:], w|1)
	}
}

// read makes the bytes at off, a multiple of 4 KiB.
func (c *content) read(p []byte, off int64) {
	if c.zero {
		clear(p)
	} else {
		fill(p, c.seed, off)
	}
	if len(c.patches) == 0 {
		return
	}
	for b := off / patchBlock; b*patchBlock < off+int64(len(p)); b++ {
		if seed, ok := c.patches[b]; ok {
			at := b*patchBlock - off
			fill(p[at:min(at+patchBlock, int64(len(p)))], seed, b*patchBlock)
		}
	}
}

// patched is c with further blocks overwritten.
func (c *content) patched(blocks map[int64]uint64) content {
	n := *c
	n.patches = make(map[int64]uint64, len(c.patches)+len(blocks))
	for b, s := range c.patches {
		n.patches[b] = s
	}
	for b, s := range blocks {
		n.patches[b] = s
	}
	return n
}

// sum is the SHA-256 of the whole content.
func (c *content) sum() string {
	h := sha256.New()
	buf := make([]byte, 1<<20)
	for off := int64(0); off < c.size; off += int64(len(buf)) {
		p := buf[:min(int64(len(buf)), c.size-off)]
		c.read(p, off)
		h.Write(p) //nolint:errcheck // a hash does not fail
	}
	return hex.EncodeToString(h.Sum(nil))
}

// writeTo writes the ranges of the content for which take says yes into a new
// sparse file; run is the granularity in which it is asked.
func (c *content) writeTo(path string, run int64, take func(n int64) bool) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() {
		if e := f.Close(); err == nil {
			err = e
		}
	}()
	if err := f.Truncate(c.size); err != nil {
		return err
	}
	buf := make([]byte, run)
	for n := int64(0); n*run < c.size; n++ {
		if !take(n) {
			continue
		}
		p := buf[:min(run, c.size-n*run)]
		c.read(p, n*run)
		if _, err := f.WriteAt(p, n*run); err != nil {
			return err
		}
	}
	return f.Sync()
}

// sumFile is the SHA-256 of what path shows, read past the page cache when
// direct is set, as fio reads it.
func sumFile(path string, size int64, direct bool) (string, error) {
	flags := os.O_RDONLY
	if direct {
		flags |= unix.O_DIRECT
	}
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	buf, free, err := aligned(1 << 20)
	if err != nil {
		return "", err
	}
	defer free()
	h := sha256.New()
	var done int64
	for done < size {
		n, err := f.ReadAt(buf[:min(int64(len(buf)), size-done)], done)
		h.Write(buf[:n]) //nolint:errcheck // a hash does not fail
		done += int64(n)
		if err != nil && (err != io.EOF || n == 0) {
			return "", fmt.Errorf("at %d: %w", done, err)
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// aligned is a buffer for O_DIRECT.
func aligned(n int) (p []byte, free func(), err error) {
	p, err = unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return nil, nil, fmt.Errorf("buffer: %w", err)
	}
	return p, func() { _ = unix.Munmap(p) }, nil
}
